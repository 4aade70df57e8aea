"""Headrace's driver in the comparison: default options. Called by compare.py."""

from __future__ import annotations

import json
import sys
import time

import workloads as w


def main() -> None:
    job = json.loads(sys.argv[1])
    import ray

    ray.init(address=job["address"], logging_level="error", log_to_driver=False)
    import headrace as hr

    connected = time.time()
    ds = hr.read_parquet(f"{job['data']}/in")
    if job["workload"] == "images":
        ds = ds.map_batches(w.decode_arrays, fn_args=(job["log"],))
        device = {"device": "sim", "constructor_args": (job["rate"], job["log"])}
        ds = ds.predict(w.Device, input="image", output="out", **device).drop("image")
    elif job["workload"] == "tabular":
        model = f"{job['data']}/model.ubj"
        ds = ds.predict(w.Scorer, input=w.FEATURES, output="out", constructor_args=(model, job["log"]))
    else:
        ds = ds.map_batches(w.double, fn_args=(job["log"],))
    told = {"connected": connected, "called": time.time()}
    if job["mode"] == "first":
        batches = ds.iter_batches(batch_size=job["first_rows"], engine="ray", progress="quiet")
        next(batches)
        told["first"] = time.time()
        batches.close()
    else:
        run = ds.write_parquet(job["out"], engine="ray", progress="quiet", **job["knobs"])
        told |= {"rows": run.rows, "first_output_s": run.first_output_s, "report": str(run)}
    told["finished"] = time.time()
    print("TOLD " + json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

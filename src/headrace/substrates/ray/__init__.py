"""Workers as actors of a Ray cluster, blocks as objects in its stores, placement by its resources.

General layout: `cluster` (which nodes there are, and how we got there), `placement` (which workers go where: pure), `standing`
(why a pool has no worker yet), `actor` (a worker), `store` (its blocks), `remains` (what it leaves behind when it dies), `pool`
(the driver's side). The only folder that imports ray.
"""

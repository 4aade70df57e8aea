"""Many runs in one program: jobs, and the processes that small ones share."""

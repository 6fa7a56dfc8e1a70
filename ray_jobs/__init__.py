"""What runs on a cluster: one module a job, each `python -m ray_jobs.NAME --config FILE`."""

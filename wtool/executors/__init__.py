"""Where a plan runs.

local      this process, with threads
ray        a Ray cluster: the output in parts, a file each
ray_jobs   whole commands on a Ray cluster
"""

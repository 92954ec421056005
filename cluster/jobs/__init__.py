"""Commands as jobs on a running cluster: the working tree is shipped, the log followed, the exit code the job's."""

from cluster.jobs.running import follow, list_jobs, stop
from cluster.jobs.server import JobResult, JobRow
from cluster.jobs.submission import PASSED, submit

__all__ = ["PASSED", "JobResult", "JobRow", "follow", "list_jobs", "stop", "submit"]

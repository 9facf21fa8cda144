"""Training jobs: what users see of them, who works on them, and the process that runs one."""

"""Where the processes of a stage start: on this machine, in a Slurm job, or described in a Kubernetes manifest."""

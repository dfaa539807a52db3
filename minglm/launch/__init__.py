"""Start a run on many GPUs: the script for torchrun, Slurm or Kubernetes, and a rehearsal without any (no section)."""

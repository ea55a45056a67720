"""Where a plan runs: `local`, this process."""

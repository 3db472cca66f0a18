"""What a run would need on a pod that is not attached: memory, time a step, hours, cost."""

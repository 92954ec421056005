"""What a run will take before it is started: memory, bytes, seconds. Arithmetic alone; nothing here imports torch."""

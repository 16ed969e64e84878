"""Programs to run and to read; the benchmark takes the model and the text of one."""

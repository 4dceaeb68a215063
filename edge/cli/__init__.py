"""The commands `edge-daemon` and `edge-ask`: options in, exit codes out."""

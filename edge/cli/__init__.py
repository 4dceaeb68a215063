"""The commands `edge-daemon` and `edge-ask`."""

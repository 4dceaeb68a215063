"""The client side: connections to a daemon or a bundle, and what `edge-ask` shows."""

"""The device side: maps a bundle and answers requests over MQTT or serial."""

"""Requests, answers and readings over MQTT."""

"""Adapters for the models that this project runs, and how they are made. No part of the product."""

"""The model: layers, attention, experts, cache, and how numbers are rounded and placed."""

"""Costs, memory and meshes of full-size jobs, without a device."""

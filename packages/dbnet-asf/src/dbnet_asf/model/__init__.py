"""The network: backbone, neck with adaptive scale fusion, heads, and their assembly."""

"""One TOML file per machine; moe_offload/device.py has the schema."""

"""What `moekit plan --list` shows: the models and the devices it knows by name."""

import json
from pathlib import Path

from moekit.plan.devices import devices
from moekit.plan.sources import preset_names
from moekit.plan.words import scaled


def show_list(device_file: str | None, as_json: bool) -> int:
    """Print the names; devices with what they have."""
    machines = devices(None if device_file is None else Path(device_file))
    if as_json:
        found = {name: {**d._asdict(), "rates": dict(d.rates), "links": dict(d.links)} for name, d in machines.items()}
        print(json.dumps({"models": preset_names(), "devices": found}))
        return 0
    from moekit.cli.console import show_table  # noqa: PLC0415 - rich comes late

    print("models: " + ", ".join(preset_names()))
    rows = [
        (name, scaled(d.memory, "B", "bytes"), scaled(d.bandwidth, "B/s", "B/s"), d.date)
        for name, d in machines.items()
    ]
    show_table("devices", ("name", "memory", "bandwidth", "as of"), rows)
    return 0

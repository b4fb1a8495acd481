"""Named configurations, one TOML file each: `moekit train NAME` starts from it."""

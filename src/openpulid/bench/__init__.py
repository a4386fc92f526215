"""The benchmark: measures that know no method and no model."""

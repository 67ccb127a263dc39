"""Volume rendering as pure functions. The field comes in as a callable: rendering knows no model."""

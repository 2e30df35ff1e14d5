"""The tables of the mechanisms' pages: one module a family, each with its `TABLES` (name → function)."""

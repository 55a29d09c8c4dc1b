"""The engine of conversion: files, rules, folders; it knows no family."""

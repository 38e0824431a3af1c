"""Adapters to other libraries. Nothing here is imported unless asked for: each module needs the library it is named after."""

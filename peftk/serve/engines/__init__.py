"""Plug-ins for serving engines of others."""

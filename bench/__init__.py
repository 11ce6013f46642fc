"""Measurements that ship with the checkout and not with the package."""

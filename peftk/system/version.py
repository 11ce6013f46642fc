"""The version of this package, for whoever can't import the package itself."""

__version__ = "0.1.0"

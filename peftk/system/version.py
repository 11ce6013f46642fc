"""The version of this package, in a module that can be imported without the package."""

__version__ = "0.1.0"

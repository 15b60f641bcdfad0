"""Where SAEs come from: a folder or file, the Hub, or the short name of a release."""

from .source import Located, local_source, locate_source

__all__ = ["Located", "local_source", "locate_source"]

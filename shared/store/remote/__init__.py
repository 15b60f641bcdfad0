"""A store in a bucket: objects, lease, cache, upload and ranged reads."""

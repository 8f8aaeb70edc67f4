"""The same work done with both packages."""

"""Tests that need a process of their own, and tests of the repository itself."""

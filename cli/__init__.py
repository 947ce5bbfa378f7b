"""The commands optimize and attnopt: one file per command."""

"""Images, videos and pages, as files."""

"""What users see besides files: tables in notebooks."""

"""The page of the microscope: HTML, style and ES modules, which use the report's components."""

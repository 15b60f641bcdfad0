"""The web server: its endpoints, its checks of each request, and the files of the page."""

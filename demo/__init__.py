"""The demo: generated factory-floor images, and the script that runs the whole loop on them."""

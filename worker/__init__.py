"""What a round does, and all it needs: settings, store, Label Studio, images, detector, training, jobs."""

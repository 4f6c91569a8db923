"""Images with annotations: masks, boxes, depth, key points. A data set a file."""

"""A source some of whose images cannot be read."""

from sslkit.data.decode import UnreadableImage


class PartlyBroken:
    """Images with labels 0 to 6; those at the places ``broken`` cannot be read."""

    num_classes, class_names = 7, None

    def __init__(self, images, broken=()):
        self.images = images
        self.broken = set(broken)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.broken:
            raise UnreadableImage(self.name(index), "truncated")
        return self.images[index]

    def name(self, index):
        return f"photo_{index}.jpg"

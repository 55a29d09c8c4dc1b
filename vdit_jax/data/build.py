"""Make a TFDS dataset of captioned video files; needs no TensorFlow.

  python -m vdit_jax.data.build --videos=DIR --captions=FILE.jsonl \
    --data_dir=DATA --name=mine/clips

A record is a clip as its file was, so that nothing is lost, of any size and
length ("clips", the form that `reading` calls so):

  mp4         the file's bytes (Text): mp4, webm, avi, ...; or an image's
  captions    one or more (Sequence(Text): a bytes_list of as many values)
  key         the file's name below --videos (Text)
  fps         float32, mean of a clip whose rate varies; 0 of an image
  num_frames, height, width
              int64: frames that the first video stream decodes to, and their
              pixels as displayed, that is after the rotation that the file
              asks for has been applied
  scores      float32 scalars, one for each numeric column of the captions'
              file (motion_score, aesthetic_score, ...), NaN where a row has
              none; the dataset's metadata list their names under "scores"

A JPEG or PNG file is a clip of one frame with fps 0, and is read as a video's:
PyAV decodes both, and `frame.rotation` says of both how they are turned.
Beside each split's files lies its `index.Index`.
"""

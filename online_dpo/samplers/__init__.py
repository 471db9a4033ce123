"""Where responses come from: three interchangeable samplers behind one worker-side handler."""

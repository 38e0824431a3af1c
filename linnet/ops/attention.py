from linnet.ops.elementwise import _todo as softmax_attention

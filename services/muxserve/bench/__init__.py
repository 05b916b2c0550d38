"""`muxserve bench`: a load generator for any server of many models, and what is made of its measurements."""

package nbd

import (
	"errors"

	"graindisk/internal/access"
)

var (
	errNotAllowed = errors.New("client may not use this listener")
	errRevoked    = errors.New("client may no longer use this export so")
)

// mayStay says whether a client that has only connected can be allowed anything here. A certificate
// may still come.
func (c *conn) mayStay() bool {
	allow := c.listen.Allow
	return len(allow) == 0 || allow.Match(c.peer) || c.listen.TLS != nil && !c.secured && allow.Has(access.Cert)
}

// level is what the client may do with an export of that name, which need not exist.
func (c *conn) level(export string) access.Level {
	if allow := c.listen.Allow; len(allow) > 0 && !allow.Match(c.peer) {
		return access.None
	}
	if c.srv.opt.Access == nil {
		return access.Write
	}
	return c.srv.opt.Access(c.peer, export)
}

// visible are the exports that the client may open. The others are not there for it: an answer that
// told them apart from missing ones would let a stranger find out which names are taken.
func (c *conn) visible() []string {
	var names []string
	for _, name := range c.srv.opt.Exports.List() {
		if c.level(name) != access.None {
			names = append(names, name)
		}
	}
	return names
}

// admit looks up what the client may do with an export and remembers it, or fails as if there were
// no such export.
func (c *conn) admit(export string) error {
	c.mu.Lock() // over the question too: Recheck asks after the rules have changed
	c.granted, c.grantedOn = c.level(export), export
	l := c.granted
	c.mu.Unlock()
	if l != access.None {
		return nil
	}
	c.log.Warn("export refused: no rule allows this client", "export", export, "peer", c.peer)
	return ErrNotFound
}

// readOnly says whether the client may only read: the device is so, or its grant.
func (c *conn) readOnly() bool { return c.dev.ReadOnly() || c.granted != access.Write }

// Recheck asks Options.Access again for every client, after the rules have changed, and breaks off
// those that may now do less than they were told when they connected. Who connects again meets the
// new rules.
func (s *Server) Recheck() {
	s.mu.Lock()
	conns := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.mu.Lock()
		revoked := c.granted != access.None && c.level(c.grantedOn) < c.granted
		c.mu.Unlock()
		if revoked {
			c.fail(errRevoked)
		}
	}
}

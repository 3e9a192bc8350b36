package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Problem is one thing wrong with a configuration.
type Problem struct {
	Line  int    `json:"line,omitempty"`  // in the file, from 1; 0 when there is no line to name
	Key   string `json:"key,omitempty"`   // pools.main.targets[0].s3.bucket, or an environment variable
	Value string `json:"value,omitempty"` // as written; never a secret
	Msg   string `json:"message"`
	Hint  string `json:"hint,omitempty"` // what to do about it
}

// String is "line 4: tier.siez: unknown key (did you mean size?)".
func (p Problem) String() string {
	var b strings.Builder
	if p.Line > 0 {
		fmt.Fprintf(&b, "line %d: ", p.Line)
	}
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	b.WriteString(p.Msg)
	if p.Hint != "" {
		b.WriteString(" (" + p.Hint + ")")
	}
	return b.String()
}

// Problems is everything wrong with one configuration, in the order of its lines; never empty as an
// error.
type Problems struct {
	Source string // the file's path, or "embedded default"
	List   []Problem
}

// Error is one line: the first problem, and how many more there are.
func (p *Problems) Error() string {
	s := "configuration " + p.Source + ": " + p.List[0].String()
	if more := len(p.List) - 1; more > 0 {
		s += fmt.Sprintf("; and %d more, see \"gateway config check\"", more)
	}
	return s
}

// collector gathers problems, at most one for each key: the first is the cause, the rest follow.
type collector struct {
	lines map[string]int    // key → line
	env   map[string]string // key → the environment variable that set it
	keys  map[string]bool
	list  []Problem
}

func newCollector() *collector {
	return &collector{lines: map[string]int{}, env: map[string]string{}, keys: map[string]bool{}}
}

// add notes a problem, unless the key or one above it has one. A missing line is that of the nearest
// key above; a value that came from the environment has none.
func (c *collector) add(p Problem) {
	for k := p.Key; k != ""; k = parentKey(k) {
		if c.keys[k] {
			return
		}
		if p.Line == 0 && c.env[p.Key] == "" {
			p.Line = c.lines[k]
		}
	}
	if name := c.env[p.Key]; name != "" && p.Line == 0 {
		p.Msg += ", set by " + name
	}
	c.addMore(p)
}

// addMore notes a problem even when the key has one.
func (c *collector) addMore(p Problem) {
	c.keys[p.Key] = true
	c.list = append(c.list, p)
}

// bad says whether the key, or one above or below it, has a problem.
func (c *collector) bad(key string) bool {
	for k := key; k != ""; k = parentKey(k) {
		if c.keys[k] {
			return true
		}
	}
	for k := range c.keys {
		if strings.HasPrefix(k, key+".") || strings.HasPrefix(k, key+"[") {
			return true
		}
	}
	return false
}

// err is what was gathered, or nil.
func (c *collector) err(source string) error {
	if len(c.list) == 0 {
		return nil
	}
	slices.SortStableFunc(c.list, func(a, b Problem) int { return cmp.Compare(a.Line, b.Line) })
	return &Problems{Source: source, List: c.list}
}

// parentKey is "a.b" for "a.b.c" and for "a.b[1]", and "" for "a".
func parentKey(key string) string {
	return key[:max(strings.LastIndexAny(key, ".["), 0)]
}

package config

import (
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/agext/levenshtein"
	"go.yaml.in/yaml/v3"

	"graindisk/internal/access"
)

// notBuilt are keys that the design has and this version does not: accepting them would promise
// what is not kept.
var notBuilt = map[reflect.Type]map[string]string{
	reflect.TypeFor[Pool](): {
		"fencing":      "pools without fencing are not built yet",
		"enospc_after": "ENOSPC after a time is not built yet",
		"encryption":   "encryption at rest is not built yet",
	},
	reflect.TypeFor[Disk](): {
		"durability": "durability per disk is not built yet",
	},
}

// place is a key in its three spellings.
type place struct {
	key   string   // for people: pools.main.targets[0].s3
	viper string   // for viper: pools::main::targets::0::s3
	env   []string // for the environment, each with its prefix; elements of lists have several
}

// viperDelim joins the levels of a viper key; names may hold dots.
const viperDelim = "::"

func (p place) child(name string) place {
	return p.join(strings.TrimPrefix(p.key+"."+name, "."), name, name)
}

// elem is the i-th element of a list, which in the environment also goes by its name.
func (p place) elem(i int, name string) place {
	n := strconv.Itoa(i)
	if name == "" || name == n {
		return p.join(p.key+"["+n+"]", n, n)
	}
	return p.join(p.key+"["+n+"]", n, n, name)
}

func (p place) join(key, viper string, names ...string) place {
	q := place{key: key, viper: strings.TrimPrefix(p.viper+viperDelim+viper, viperDelim)}
	for _, e := range p.env {
		for _, n := range names {
			q.env = append(q.env, e+"_"+envReplacer.Replace(strings.ToUpper(n)))
		}
	}
	return q
}

var envReplacer = strings.NewReplacer("-", "_", ".", "_")

// leaf is a key that an environment variable can set.
type leaf struct {
	place
	check func(string) error
}

// walker goes down the YAML tree and the type of Config together. It notes every problem, and leaves
// a tree that viper can read: what has a problem or says nothing is cut out, all scalars are strings,
// so that no YAML rule turns a bucket named 0x10 into 16, and lists are maps keyed by index, so that
// the environment can override inside them.
type walker struct {
	*collector
	leaves map[string][]leaf // environment variable → the keys it could mean
}

// walk reports whether n, whose type is t, can stay in the tree. n is nil where the file has nothing.
func (w *walker) walk(n *yaml.Node, t reflect.Type, p place, f reflect.StructTag) bool {
	if n != nil {
		w.lines[p.key] = n.Line
		if n.Kind == yaml.AliasNode {
			w.add(Problem{Line: n.Line, Key: p.key, Msg: "YAML aliases are not supported"})
			return false
		}
		if n.ShortTag() == "!!null" {
			if t == reflect.TypeFor[[]Rule]() {
				w.add(Problem{Line: n.Line, Key: p.key, Msg: noRules})
			}
			n = nil // as if it were not there
		}
	}
	switch {
	case t.Kind() == reflect.Pointer:
		return w.walk(n, t.Elem(), p, f)
	case t.Kind() == reflect.Struct:
		return w.walkStruct(n, t, p)
	case t.Kind() == reflect.Map:
		return w.walkMap(n, t, p)
	case t.Kind() == reflect.Slice:
		return w.walkList(n, t, p)
	}
	check := func(s string) error { return checkScalar(t, f, s) }
	w.addLeaf(p, check)
	if n == nil {
		return false
	}
	if n.Kind != yaml.ScalarNode {
		w.add(Problem{Line: n.Line, Key: p.key, Msg: "must be one value, not a " + kindName(n)})
		return false
	}
	if err := check(n.Value); err != nil {
		w.add(Problem{Line: n.Line, Key: p.key, Value: shownValue(t, n.Value), Msg: err.Error()})
		return false
	}
	n.Tag, n.Style = "!!str", yaml.DoubleQuotedStyle
	return true
}

func (w *walker) walkStruct(n *yaml.Node, t reflect.Type, p place) bool {
	fields := map[string]reflect.StructField{}
	for i := range t.NumField() {
		if name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ","); name != "-" {
			fields[name] = t.Field(i)
		}
	}
	if n != nil && n.Kind == yaml.ScalarNode && t == reflect.TypeFor[Listener]() {
		*n = yaml.Node{Kind: yaml.MappingNode, Line: n.Line, Content: []*yaml.Node{
			{Kind: yaml.ScalarNode, Tag: "!!str", Value: "address", Line: n.Line},
			{Kind: yaml.ScalarNode, Tag: "!!str", Value: n.Value, Line: n.Line},
		}}
	}
	children, ok := w.mapping(n, p)
	var content []*yaml.Node
	seen := map[string]bool{}
	for _, c := range children {
		field, known := fields[c.key.Value]
		if !known {
			w.unknown(c.key, t, fields, p)
			continue
		}
		seen[c.key.Value] = true
		if w.walk(c.value, field.Type, p.child(c.key.Value), field.Tag) {
			content = append(content, c.key, c.value)
		}
	}
	for name, field := range fields { // what the environment may add
		if !seen[name] {
			w.walk(nil, field.Type, p.child(name), field.Tag)
		}
	}
	if ok {
		n.Content = content
	}
	return ok
}

func (w *walker) walkMap(n *yaml.Node, t reflect.Type, p place) bool {
	children, ok := w.mapping(n, p)
	var content []*yaml.Node
	for _, c := range children {
		q := p.child(c.key.Value)
		w.lines[q.key] = c.key.Line
		if err := CheckDiskName(c.key.Value); err != nil {
			w.add(Problem{Line: c.key.Line, Key: q.key, Value: c.key.Value, Msg: err.Error()})
			continue
		}
		if isEmpty(c.value) {
			w.add(Problem{Line: c.key.Line, Key: q.key, Msg: "is empty"})
			continue
		}
		if w.walk(c.value, t.Elem(), q, "") {
			c.key.Tag, c.key.Style = "!!str", yaml.DoubleQuotedStyle
			content = append(content, c.key, c.value)
		}
	}
	if ok {
		n.Content = content
	}
	return ok
}

func (w *walker) walkList(n *yaml.Node, t reflect.Type, p place) bool {
	if t.Elem() == reflect.TypeFor[Listener]() {
		w.addLeaf(p, checkAddressList)
	}
	if t.Elem() == reflect.TypeFor[Rule]() {
		w.addLeaf(p, checkRuleList)
	}
	if n == nil {
		return false
	}
	if t.Elem() == reflect.TypeFor[Rule]() && n.Kind == yaml.SequenceNode && len(n.Content) == 0 {
		w.add(Problem{Line: n.Line, Key: p.key, Msg: noRules})
		return false
	}
	if n.Kind != yaml.SequenceNode {
		w.add(Problem{Line: n.Line, Key: p.key, Msg: "must be a list, not a " + kindName(n)})
		return false
	}
	var content []*yaml.Node
	for i, c := range n.Content {
		q := p.elem(i, nameOf(c))
		if isEmpty(c) {
			w.add(Problem{Line: c.Line, Key: q.key, Msg: "is empty"})
			continue
		}
		if w.walk(c, t.Elem(), q, "") {
			content = append(content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str",
				Value: strconv.Itoa(i), Style: yaml.DoubleQuotedStyle}, c)
		}
	}
	*n = yaml.Node{Kind: yaml.MappingNode, Line: n.Line, Content: content}
	return true
}

type pair struct{ key, value *yaml.Node }

// mapping returns the pairs of n without the duplicates, which it reports.
func (w *walker) mapping(n *yaml.Node, p place) (pairs []pair, ok bool) {
	if n == nil {
		return nil, false
	}
	if n.Kind != yaml.MappingNode {
		w.add(Problem{Line: n.Line, Key: p.key, Msg: "must be a mapping, not a " + kindName(n)})
		return nil, false
	}
	first := map[string]int{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		k := n.Content[i]
		if line, dup := first[k.Value]; dup {
			w.addMore(Problem{Line: k.Line, Key: p.child(k.Value).key, Msg: fmt.Sprintf("is there twice, first in line %d", line)})
			continue
		}
		first[k.Value] = k.Line
		pairs = append(pairs, pair{k, n.Content[i+1]})
	}
	return pairs, true
}

func (w *walker) addLeaf(p place, check func(string) error) {
	for _, e := range p.env {
		w.leaves[e] = append(w.leaves[e], leaf{p, check})
	}
}

// unknown reports a key that t does not have.
func (w *walker) unknown(k *yaml.Node, t reflect.Type, fields map[string]reflect.StructField, p place) {
	pr := Problem{Line: k.Line, Key: p.child(k.Value).key}
	if msg, ok := notBuilt[t][k.Value]; ok {
		pr.Msg = msg
		w.add(pr)
		return
	}
	pr.Msg = "unknown key"
	known := make([]string, 0, len(fields))
	for name := range fields {
		known = append(known, name)
	}
	if elsewhere := schemaKeys(reflect.TypeFor[Config](), "")[k.Value]; elsewhere != "" {
		pr.Hint = "it belongs in " + elsewhere
	} else {
		pr.Hint = "did you mean " + nearest(k.Value, known) + "?"
	}
	w.add(pr)
}

// schemaKeys maps every key below t to the place it belongs in, "the top level" for those of Config.
func schemaKeys(t reflect.Type, at string) map[string]string {
	for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice || t.Kind() == reflect.Map {
		switch t.Kind() {
		case reflect.Slice:
			at += "[]"
		case reflect.Map:
			at += ".NAME"
		}
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return nil
	}
	keys := map[string]string{}
	for i := range t.NumField() {
		name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ",")
		if name == "-" {
			continue
		}
		for k, place := range schemaKeys(t.Field(i).Type, strings.TrimPrefix(at+"."+name, ".")) {
			if keys[k] == "" {
				keys[k] = place
			}
		}
	}
	for i := range t.NumField() { // the outer place is the better guess
		if name, _, _ := strings.Cut(t.Field(i).Tag.Get("yaml"), ","); name != "-" {
			keys[name] = at
			if at == "" {
				keys[name] = "the top level"
			}
		}
	}
	return keys
}

// nearest is the one of known that takes the fewest edits to get from s; the first in the alphabet of
// several.
func nearest(s string, known []string) string {
	slices.Sort(known)
	return slices.MinFunc(known, func(a, b string) int {
		return levenshtein.Distance(s, a, nil) - levenshtein.Distance(s, b, nil)
	})
}

// checkScalar says why s cannot be the value of a key of type t.
func checkScalar(t reflect.Type, f reflect.StructTag, s string) error {
	switch {
	case t == reflect.TypeFor[Bytes]():
		n, err := ParseSize(s)
		if err == nil && n == 0 {
			err = fmt.Errorf("must be more than 0")
		}
		return err
	case t == reflect.TypeFor[time.Duration]():
		if d, err := time.ParseDuration(s); err != nil || d < 0 {
			return fmt.Errorf("%q is not a duration such as 30s or 5m", s)
		}
	case t == reflect.TypeFor[Ack]():
		if s != string(AckWritten) && s != string(AckStable) {
			return fmt.Errorf("%q is neither written nor stable", s)
		}
	case t == reflect.TypeFor[TLS]():
		if v := TLS(s); v != TLSOff && v != TLSOffer && v != TLSRequire {
			return fmt.Errorf("%q is none of off, offer and require", s)
		}
	case t == reflect.TypeFor[Rule]():
		_, err := access.Parse(s)
		return err
	case t == reflect.TypeFor[Compression]():
		if c := Compression(s); c != CompressionNone && c != CompressionS2 && c != CompressionZstd {
			return fmt.Errorf("%q is none of none, s2 and zstd", s)
		}
	case t.Kind() == reflect.Int:
		var lo, hi int
		if _, err := fmt.Sscanf(f.Get("range"), "%d-%d", &lo, &hi); err != nil {
			panic("config: integer key without a range")
		}
		if n, err := strconv.Atoi(s); err != nil || n < lo || n > hi {
			return fmt.Errorf("%q is not a number from %d to %d", s, lo, hi)
		}
	case t.Kind() == reflect.Float64:
		if x, err := strconv.ParseFloat(s, 64); err != nil || !(x >= 0 && x <= 1e9) {
			return fmt.Errorf("%q is not a number of at least 0", s)
		}
	case t.Kind() == reflect.Bool:
		if s != "true" && s != "false" {
			return fmt.Errorf("%q is neither true nor false", s)
		}
	case t.Kind() != reflect.String:
		panic("config: no check for type " + t.String())
	}
	return nil
}

// checkAddressList checks a list of listeners as the environment gives it.
func checkAddressList(s string) error {
	for a := range strings.SplitSeq(s, ",") {
		if err := checkAddress(strings.TrimSpace(a)); err != nil {
			return fmt.Errorf("%q: %w", a, err)
		}
	}
	return nil
}

// noRules is said of a list of rules without any: nobody who writes one means everybody.
const noRules = "has no rule; leave the key out to allow every client"

// checkRuleList checks a list of access rules as the environment gives it.
func checkRuleList(s string) error {
	for r := range strings.SplitSeq(s, ",") {
		if _, err := access.Parse(r); err != nil {
			return err
		}
	}
	return nil
}

// nameOf is the name that a list's element gives itself, or "".
func nameOf(n *yaml.Node) string {
	for i := 0; n.Kind == yaml.MappingNode && i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "name" {
			return n.Content[i+1].Value
		}
	}
	return ""
}

func isEmpty(n *yaml.Node) bool {
	return n.ShortTag() == "!!null" || n.Kind == yaml.MappingNode && len(n.Content) == 0
}

func kindName(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "mapping"
	case yaml.SequenceNode:
		return "list"
	}
	return "single value"
}

func shownValue(t reflect.Type, s string) string {
	if t == reflect.TypeFor[Secret]() {
		return Secret(s).String()
	}
	return s
}

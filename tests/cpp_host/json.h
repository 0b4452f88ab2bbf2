// Reading JSON: just what a manifest and the header of a safetensors file need.
#pragma once

#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace json {

class Value;
using Array = std::vector<Value>;
using Object = std::map<std::string, Value>;

class Value {
 public:
  std::variant<std::nullptr_t, bool, double, std::string, std::shared_ptr<Array>, std::shared_ptr<Object>> data = nullptr;

  bool null() const { return std::holds_alternative<std::nullptr_t>(data); }
  bool truth() const { return std::get<bool>(data); }
  double number() const { return std::get<double>(data); }
  long whole() const { return static_cast<long>(number()); }
  const std::string& text() const { return std::get<std::string>(data); }
  const Array& array() const { return *std::get<std::shared_ptr<Array>>(data); }
  const Object& object() const { return *std::get<std::shared_ptr<Object>>(data); }
  bool has(const std::string& key) const { return object().count(key) != 0; }

  const Value& operator[](const std::string& key) const {
    auto found = object().find(key);
    if (found == object().end()) throw std::runtime_error("the JSON has no field '" + key + "'");
    return found->second;
  }
};

class Reader {
 public:
  explicit Reader(const std::string& text) : text_(text) {}

  Value read() {
    Value value = next();
    skip();
    if (at_ != text_.size()) fail("something follows the value");
    return value;
  }

 private:
  const std::string& text_;
  size_t at_ = 0;

  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error("malformed JSON at byte " + std::to_string(at_) + ": " + what);
  }

  void skip() {
    while (at_ < text_.size() && std::string(" \t\r\n").find(text_[at_]) != std::string::npos) ++at_;
  }

  char peek() {
    skip();
    if (at_ >= text_.size()) fail("it ends too early");
    return text_[at_];
  }

  void expect(char wanted) {
    if (peek() != wanted) fail(std::string("expected '") + wanted + "'");
    ++at_;
  }

  bool word(const std::string& wanted) {
    if (text_.compare(at_, wanted.size(), wanted) != 0) return false;
    at_ += wanted.size();
    return true;
  }

  Value next() {
    Value value;
    char first = peek();
    if (first == '{') {
      auto object = std::make_shared<Object>();
      ++at_;
      while (peek() != '}') {
        if (!object->empty()) expect(',');
        peek();
        std::string key = text();
        expect(':');
        (*object)[key] = next();
      }
      ++at_;
      value.data = object;
    } else if (first == '[') {
      auto array = std::make_shared<Array>();
      ++at_;
      while (peek() != ']') {
        if (!array->empty()) expect(',');
        array->push_back(next());
      }
      ++at_;
      value.data = array;
    } else if (first == '"') {
      value.data = text();
    } else if (word("true")) {
      value.data = true;
    } else if (word("false")) {
      value.data = false;
    } else if (!word("null")) {
      char* end = nullptr;
      double number = std::strtod(text_.c_str() + at_, &end);
      if (end == text_.c_str() + at_) fail("no value");
      at_ = end - text_.c_str();
      value.data = number;
    }
    return value;
  }

  std::string text() {
    expect('"');
    std::string found;
    while (at_ < text_.size() && text_[at_] != '"') {
      char c = text_[at_++];
      if (c != '\\') {
        found += c;
        continue;
      }
      char escaped = text_[at_++];
      switch (escaped) {
        case 'n': found += '\n'; break;
        case 't': found += '\t'; break;
        case 'r': found += '\r'; break;
        case 'b': found += '\b'; break;
        case 'f': found += '\f'; break;
        case 'u': {
          unsigned code = std::stoul(text_.substr(at_, 4), nullptr, 16);
          at_ += 4;
          if (code < 0x80) {
            found += static_cast<char>(code);
          } else if (code < 0x800) {
            found += static_cast<char>(0xC0 | (code >> 6));
            found += static_cast<char>(0x80 | (code & 0x3F));
          } else {
            found += static_cast<char>(0xE0 | (code >> 12));
            found += static_cast<char>(0x80 | ((code >> 6) & 0x3F));
            found += static_cast<char>(0x80 | (code & 0x3F));
          }
          break;
        }
        default: found += escaped;
      }
    }
    expect('"');
    return found;
  }
};

inline Value parse(const std::string& text) { return Reader(text).read(); }

}  // namespace json

#include "pifaLinearChecks.h"

#include <atomic>
#include <limits>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

namespace pifa
{
namespace
{

using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

std::atomic<void (*)(char const*)> gSink{nullptr};

// Returns the length of a text field without the zero bytes that some parsers count in; -1 if it is no text.
int32_t textLength(PluginField const& field)
{
    if (field.type != PluginFieldType::kCHAR || field.length < 0 || (field.length > 0 && field.data == nullptr))
    {
        return -1;
    }
    auto const* text = static_cast<char const*>(field.data);
    int32_t length = field.length;
    while (length > 0 && text[length - 1] == '\0')
    {
        --length;
    }
    return length == 0 || memchr(text, '\0', length) == nullptr ? length : -1;
}

bool readText(Attributes const& found, PluginField const& field, char const* expected)
{
    int32_t const length = textLength(field);
    if (length < 0)
    {
        refuse(found, "field %s is not text; export the model again", field.name);
        return false;
    }
    if (length != static_cast<int32_t>(strlen(expected)) || memcmp(field.data, expected, length) != 0)
    {
        refuse(found, "%s is '%.*s', this library knows '%s'; export the model again or use its own library",
            field.name, length < 64 ? length : 64, static_cast<char const*>(field.data), expected);
        return false;
    }
    return true;
}

// Parsers hand over integers in 32 or 64 bits; more than 2^31 - 1 features do not fit the index input.
bool readSize(Attributes const& found, PluginField const& field, int32_t& value)
{
    int64_t wide = 0;
    int32_t narrow = 0;
    bool const isWide = field.type == PluginFieldType::kINT64;
    if ((!isWide && field.type != PluginFieldType::kINT32) || field.length != 1 || field.data == nullptr)
    {
        refuse(found, "field %s is not one integer (type %d, length %d); export the model again", field.name,
            static_cast<int>(field.type), field.length);
        return false;
    }
    memcpy(isWide ? static_cast<void*>(&wide) : &narrow, field.data, isWide ? sizeof(wide) : sizeof(narrow));
    wide = isWide ? wide : narrow;
    if (wide < 1 || wide > std::numeric_limits<int32_t>::max())
    {
        refuse(found, "%s is %lld, expected 1 to %d; export the model again", field.name, static_cast<long long>(wide),
            std::numeric_limits<int32_t>::max());
        return false;
    }
    value = static_cast<int32_t>(wide);
    return true;
}

bool readLayer(Attributes& found, PluginField const& field)
{
    int32_t const length = textLength(field);
    if (length < 0 || length >= kLayerNameBytes)
    {
        refuse(found, "field %s is not a text of at most %d bytes; build the engine again", field.name,
            kLayerNameBytes - 1);
        return false;
    }
    memset(found.layer, 0, sizeof(found.layer));
    if (length > 0)
    {
        memcpy(found.layer, field.data, length);
    }
    return true;
}

enum Seen : uint32_t
{
    kSeenRank = 1,
    kSeenOutFeatures = 2,
    kSeenForm = 4,
    kSeenNamespace = 8,
    kSeenVersion = 16,
    kSeenLayer = 32,
    kRequiredFields = kSeenRank | kSeenOutFeatures | kSeenForm,
};

bool readField(Attributes& found, PluginField const& field, uint32_t& seen)
{
    struct Known
    {
        char const* name;
        uint32_t mark;
    };
    static constexpr Known kKnown[] = {{kRankField, kSeenRank}, {kOutFeaturesField, kSeenOutFeatures},
        {kFormField, kSeenForm}, {kNamespaceField, kSeenNamespace}, {kVersionField, kSeenVersion},
        {kLayerField, kSeenLayer}};
    uint32_t mark = 0;
    for (Known const& known : kKnown)
    {
        mark = field.name != nullptr && strcmp(field.name, known.name) == 0 ? known.mark : mark;
    }
    if (mark == 0)
    {
        refuse(found, "unknown field '%s'; the model was made by another version of pifa-deploy",
            field.name ? field.name : "(no name)");
        return false;
    }
    if (seen & mark)
    {
        refuse(found, "field %s is there twice; export the model again", field.name);
        return false;
    }
    seen |= mark;
    switch (mark)
    {
    case kSeenRank: return readSize(found, field, found.rank);
    case kSeenOutFeatures: return readSize(found, field, found.outFeatures);
    case kSeenForm: return readText(found, field, found.op->form);
    case kSeenNamespace: return readText(found, field, kNamespace);
    case kSeenVersion: return readText(found, field, kVersion);
    default: return readLayer(found, field);
    }
}

void write(char kind, Attributes const& attributes, char const* format, va_list values)
{
    char message[1024];
    int const start = snprintf(message, sizeof(message), "[%c] %s::%s layer '%.400s': ", kind, kNamespace,
        attributes.op->name, attributes.layer);
    vsnprintf(message + start, sizeof(message) - start, format, values);
    if (auto const sink = gSink.load())
    {
        sink(message);
    }
    else
    {
        fprintf(stderr, "%s\n", message);
    }
}

} // namespace

int32_t refuse(Attributes const& attributes, char const* format, ...)
{
    va_list values;
    va_start(values, format);
    write('E', attributes, format, values);
    va_end(values);
    return kRefused;
}

void warn(Attributes const& attributes, char const* format, ...)
{
    va_list values;
    va_start(values, format);
    write('W', attributes, format, values);
    va_end(values);
}

void setLogSink(void (*sink)(char const* message))
{
    gSink.store(sink);
}

bool readFields(Attributes& found, nvinfer1::PluginFieldCollection const* fields)
{
    if (fields == nullptr || fields->nbFields < 0 || (fields->nbFields > 0 && fields->fields == nullptr))
    {
        refuse(found, "there are no fields, expected %s, %s and %s", kRankField, kOutFeaturesField, kFormField);
        return false;
    }
    uint32_t seen = 0;
    // The layer's name first: the messages about the other fields need it.
    for (int32_t pass = 0; pass < 2; ++pass)
    {
        for (int32_t i = 0; i < fields->nbFields; ++i)
        {
            PluginField const& field = fields->fields[i];
            bool const namesLayer = field.name != nullptr && strcmp(field.name, kLayerField) == 0;
            if (namesLayer == (pass == 0) && !readField(found, field, seen))
            {
                return false;
            }
        }
    }
    if ((seen & kRequiredFields) != kRequiredFields)
    {
        char const* missing = !(seen & kSeenRank) ? kRankField
            : !(seen & kSeenOutFeatures)          ? kOutFeaturesField
                                                  : kFormField;
        refuse(found, "field %s is missing; export the model again", missing);
        return false;
    }
    if (found.rank > found.outFeatures)
    {
        refuse(found, "%s is %d, expected at most %s, which is %d; export the model again", kRankField, found.rank,
            kOutFeaturesField, found.outFeatures);
        return false;
    }
    return true;
}

} // namespace pifa
